"""Training jobs: encrypted training that alice and bob run by themselves, for hours, whatever breaks meanwhile."""
