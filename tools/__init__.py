"""Developer tools: building upstream's binaries and making the models that tests run."""
