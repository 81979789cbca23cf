"""What compiled code and the server agree on. Nothing here needs the compiler."""
