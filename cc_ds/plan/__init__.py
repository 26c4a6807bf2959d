"""What a run needs before there are machines for it: memory, communication, FLOPs, time.

config.json -> model on the meta device -> size.py (what it is made of)
    -> flops.py, gathers.py (ZeRO-3's all-gathers), memory.py (the step replayed on meta tensors)
    -> estimate.py (one step of SFT and of CC-Tuning on a cluster) -> report.py (text)
"""
