-- Remove the frozen frame's events, or the first of them. KEYS: queue, state.
-- ARGV: epoch, seq, events, 1 when there is an offset, the offset, ms for which the state of an idle stream is kept.
-- Returns 1 when this call did it.
local queue, state = KEYS[1], KEYS[2]
local current, count = is_current(state, ARGV[1], ARGV[2])
if not current then return 0 end
local events = math.min(count, tonumber(ARGV[3]))
local held = redis.call('HMGET', state, 'done', 'rest', 'ends', 'skip')
local cut = {done = held[1], rest = held[2], ends = held[3]}
if events < count then cut = measure(queue, tonumber(held[4] or 0), events) end
redis.call('LTRIM', queue, cut.done, -1)
redis.call('HDEL', state, 'count', 'elements', 'done', 'rest', 'ends', 'parked')
redis.call('HSET', state, 'skip', cut.rest)
redis.call('HINCRBY', state, 'seq', 1)
redis.call('HINCRBY', state, 'batches', -cut.ends)
redis.call('HINCRBY', state, 'events', -events)
if ARGV[4] == '1' then redis.call('HSET', state, 'anchor', ARGV[5]) end
if redis.call('EXISTS', queue) == 0 then redis.call('PEXPIRE', state, ARGV[6]) end
return 1
