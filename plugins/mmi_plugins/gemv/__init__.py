"""The operator `mmi::WeightOnlyMatMul`: rows times a weight in int8, float8 or int4."""
