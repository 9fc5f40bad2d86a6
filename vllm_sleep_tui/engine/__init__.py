"""All knowledge of vLLM: its flags, its HTTP, its versions, its log."""
