"""What agents can do: typed functions as tools, files, sandboxed code, offline search, MCP servers."""
