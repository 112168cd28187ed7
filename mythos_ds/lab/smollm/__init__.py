"""A real model, SmolLM2-135M-Instruct, made into a looped one by the project's own commands, and what that shows."""
