"""`infsvc monitor`: a small app of its own, which looks at a broker and owns no node."""
