"""A federation on this machine: the real server and the real sites, in one process or in many."""
