"""Running PyTorch programs on shares: which operators there are, what a program costs, how it runs."""
