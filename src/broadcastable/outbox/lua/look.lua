-- The sweeper's look at a stream. KEYS: queue, state, turns, held.
-- ARGV: ms that a lost wake-up is old, most ms to the next look, ms for which an open turn is waited for.
-- Returns {1 when it is due, when to look again in ms, or -1 when nothing is in the queue}.
local queue, state = KEYS[1], KEYS[2]
local now = now_ms()
if redis.call('EXISTS', KEYS[4]) == 1 and settle(queue, state, KEYS[3], KEYS[4], ARGV[3]) and ask(state, now) == 1 then
  return {1, text(now + ARGV[2])}
end
local head = redis.call('LINDEX', queue, 0)
if not head then
  return {0, redis.call('EXISTS', KEYS[4]) == 1 and text(now + ARGV[2]) or '-1'}
end
local held = redis.call('HMGET', state, 'until', 'after', 'parked', 'woken')
if held[3] then return {0, text(now + 60000)} end
local free = math.max(tonumber(held[2] or 0), tonumber(held[1] or 0))
if tonumber(held[2] or 0) > now then return {0, held[2]} end
local old = math.max(tonumber(held[4] or 0), (struct.unpack('>d', head, 1))) + ARGV[1]
local at = math.max(old, free)
if at > now then return {0, text(math.min(at, now + ARGV[2]))} end
redis.call('HSET', state, 'woken', text(now))
return {1, text(now + ARGV[2])}
