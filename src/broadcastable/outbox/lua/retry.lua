-- Unpark a stream and forget its delay. KEYS: queue, state, turns, held. Returns 1 when there is something to retry.
local queue, state = KEYS[1], KEYS[2]
local unparked = redis.call('HDEL', state, 'parked')
redis.call('HDEL', state, 'after')
return math.max(unparked, redis.call('EXISTS', queue, KEYS[4]) > 0 and 1 or 0)
