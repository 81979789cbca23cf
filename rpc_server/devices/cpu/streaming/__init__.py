"""Plans that send to and receive from a socket by themselves."""
