"""Which keys and values are kept or read while decoding: one file a method."""
