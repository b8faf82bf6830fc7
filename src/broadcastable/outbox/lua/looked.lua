-- Write down what looks found, in one shard of the index. KEYS: active, idle.
-- ARGV: ms that an idle stream stays listed; then for each stream its name, 1 when it was listed as idle,
-- and when to look again, or -1 when it was empty.
local active, idle = KEYS[1], KEYS[2]
local now = now_ms()
for position = 2, #ARGV, 3 do
  local stream, was_idle, again = ARGV[position], ARGV[position + 1] == '1', ARGV[position + 2]
  if again ~= '-1' then
    redis.call('ZADD', active, again, stream)
    redis.call('ZREM', idle, stream)
  elseif was_idle then
    redis.call('ZREM', idle, stream)
  else
    redis.call('ZREM', active, stream)
    redis.call('ZADD', idle, now + ARGV[1], stream)
  end
end
return 1
