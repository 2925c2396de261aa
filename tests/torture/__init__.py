"""Long runs in which processes are killed while requests go through them."""
