"""mmengine's runner with what it lacks: loops, samplers, sharding, the checkpoint to continue from."""
