"""llmfast"""
