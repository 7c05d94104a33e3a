"""What several families share: parts of configs and of checkpoints, rules of pictures, towers. No family itself."""
