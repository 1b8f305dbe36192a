"""What to fuse: a plan names its groups, a policy says how they are chosen; files and records of both."""
