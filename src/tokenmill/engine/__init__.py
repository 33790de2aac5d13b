"""From requests to tokens: scheduler, KV cache, the step loop and the thread around it."""
