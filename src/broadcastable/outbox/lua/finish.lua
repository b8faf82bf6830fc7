-- After a claim that found nothing. KEYS: queue, state. ARGV: the caller's lease or ''.
-- Returns 1 when there is something to claim after all.
local queue, state = KEYS[1], KEYS[2]
local now = now_ms()
local held = redis.call('HMGET', state, 'lease', 'until', 'after', 'parked')
if held[1] and held[1] ~= ARGV[1] and tonumber(held[2]) > now then return 0 end
redis.call('HDEL', state, 'lease', 'until')
if redis.call('EXISTS', queue) == 1 and not held[4] and tonumber(held[3] or 0) <= now then return 1 end
redis.call('HDEL', state, 'woken')
return 0
