"""What ``distattn bench`` measures; a module a question, imported only when it runs."""
