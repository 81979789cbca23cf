"""Server programs as child processes, for whatever starts servers for itself."""
