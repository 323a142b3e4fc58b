"""peft_adapters of meadow."""
