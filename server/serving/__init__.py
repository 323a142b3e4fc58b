"""Hot multi-LoRA serving: one engine thread, and an HTTP front that speaks OpenAI's protocol."""
