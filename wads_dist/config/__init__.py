"""The configuration: its schema, how it is read, and DeepSpeed's."""
