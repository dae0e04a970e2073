"""How vLLM V1 samples and takes new weights. The only package that touches vLLM."""
