"""What synthetic checkpoints are made of: `values` fills tensors, `layout` places them in files as published
checkpoints do, `side_files` makes what stands beside the weights. ``make_synthetic.py`` writes them.
"""
