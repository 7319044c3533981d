"""Static analysis of graphs: shapes, FLOPs, bytes, memory, roofline."""
