"""placeholder: interface only"""
