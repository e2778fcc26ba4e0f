"""What FlashSloth and its peers cost: visual tokens, parameters, arithmetic and memory."""
