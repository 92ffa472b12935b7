"""Chat models that agents talk to: the engine in this process, OpenAI- and Anthropic-compatible URLs, and scripts."""
