"""Reading and writing files, locks, the environment, and what differs between versions."""
