"""Which activations are computed: one file a method."""
