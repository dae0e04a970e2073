"""A backend of Triton named "cpu" that compiles nothing: vLLM's Model Runner V2 asks for one, and the interpreter runs
the kernels. For tests only."""
