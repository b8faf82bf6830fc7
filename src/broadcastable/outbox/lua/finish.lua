-- After a claim that found nothing. KEYS: queue, state. ARGV: the caller's lease or ''.
-- Returns 1 when there is something to claim after all.
return finish(KEYS[1], KEYS[2], ARGV[1])
