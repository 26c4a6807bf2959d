"""Looking inside: which layers the gate picks, and where S, S W and E lie."""
