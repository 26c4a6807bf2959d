"""The only room that imports deepspeed: process group, engine, partitioned parameters."""
