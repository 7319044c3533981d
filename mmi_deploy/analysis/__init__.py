"""Analysis of graphs without running them: shapes, FLOPs, bytes, memory, roofline."""
