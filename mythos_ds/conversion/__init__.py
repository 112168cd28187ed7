"""Other formats and other models: Hugging Face, OpenMythos, dense models cut into a loop, fp8, means, merging."""
