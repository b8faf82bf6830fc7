-- Add to what was acked in this second. KEYS: a ring of seconds. ARGV: frames, events, seconds to keep.
-- A place of the ring has the second, its frames and its events.
local second = redis.call('TIME')[1]
local place = text(second % ARGV[3])
local held = redis.call('HMGET', KEYS[1], place .. ':at', place .. ':frames', place .. ':events')
if held[1] ~= second then held = {second, 0, 0} end
redis.call('HSET', KEYS[1], place .. ':at', second, place .. ':frames', text(held[2] + ARGV[1]),
  place .. ':events', text(held[3] + ARGV[2]))
redis.call('EXPIRE', KEYS[1], ARGV[3])
