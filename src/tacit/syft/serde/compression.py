"""Compression of messages: shares are uniform bytes, which do not compress, and tacit leaves them as they are."""

NO_COMPRESSION = 40
default_compress_scheme = NO_COMPRESSION
