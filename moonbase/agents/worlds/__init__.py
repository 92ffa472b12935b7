"""Offline worlds with tasks and graders, in which agents can be measured."""
