"""The prefix cache's bookkeeping: which blocks of which token chains are where. The tensors live in the target."""
