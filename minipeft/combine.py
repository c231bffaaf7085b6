"""Floor 4: new LoRAs from old ones, by the ways of Hugging Face PEFT's add_weighted_adapter."""
