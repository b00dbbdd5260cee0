"""What a scan has found so far: the top-k of all units, the images that are in it, checkpoints, shards."""
