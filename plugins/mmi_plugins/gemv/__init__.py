"""The operator `mmi::WeightOnlyMatMul`: up to 8 rows times a weight in int8, float8 or int4."""
