"""The engine process: sequences, step planning, prefix index, speculation policy. No MLX here."""
