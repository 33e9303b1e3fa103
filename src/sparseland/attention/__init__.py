"""Which query-key pairs are computed: one file a method."""
