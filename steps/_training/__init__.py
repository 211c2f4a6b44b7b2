"""The training loop: batches, gradients in flat buffers, schedule, metrics, saves."""
