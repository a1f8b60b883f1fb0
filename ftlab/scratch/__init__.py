"""What you build by hand: torch only, imports nothing else of ftlab."""
