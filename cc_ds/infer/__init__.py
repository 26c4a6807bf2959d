"""Generation with the connection: one prefill, then plain decoding."""
