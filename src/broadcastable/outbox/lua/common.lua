-- What all scripts share: frames.lua and turns.lua go between this and those about frames and turns. Each script works
-- on the keys of one stream: its queue (a list) and its state (a hash).
--
-- An element of the queue is a batch, or a part of one that its writer found too large for a frame:
--   8 bytes  put at, ms, double      by this server's clock, added by push.lua
--   8 bytes  created at, ms, double  by the writer's clock
--   1 byte   1 when the batch ends here, 0 when its next part follows
--   4 bytes  number of events, then 4 bytes for the length of each
--   then what Lua never reads: the batch's id, txid and trace, and the events. All numbers are big-endian.
--
-- Fields of the state:
--   epoch, seq        the producer's, of the frozen frame or the next one
--   skip              events at the head of the queue's first element that are acked
--   count, elements   events and queue elements of the frozen frame; absent when none is
--   done, rest        what its ack removes: whole elements, and the skip that then holds
--   ends              batches that end within it
--   anchor            an offset from before the frame
--   lease, until      who claimed last, and to when
--   after             no claim before this time (ms)
--   parked            the error that parked the stream
--   woken             when a wake-up was asked for or a claim given; absent when no worker knows of the stream
--   batches, events   undelivered, for `pending` only

local ENDS_AT, COUNT_AT, LENGTHS_AT = 17, 18, 22

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Numbers as integers in text: Lua's own conversion would write 1.7e+12.
local function text(number)
  return string.format('%.0f', number)
end

local function ends(element)
  return element:byte(ENDS_AT) == 1
end

local function event_count(element)
  return (struct.unpack('>I4', element, COUNT_AT))
end

-- Walk the queue's elements from its head, a page at a time: a page is small at first and grows while elements are.
local function walk(queue, visit)
  local index, page, bytes = 0, 8, 0
  while true do
    local found = redis.call('LRANGE', queue, index, index + page - 1)
    for _, element in ipairs(found) do
      if not visit(element) then return end
      bytes = bytes + #element
    end
    if #found < page then return end
    index = index + page
    page = math.max(1, math.min(256, math.floor(524288 * index / bytes)))
  end
end

-- Whether something to deliver needs a wake-up: none is queued, no worker is at work, and it may be claimed now.
local function sleeps(state, now)
  local held = redis.call('HMGET', state, 'woken', 'parked', 'after')
  return not held[1] and not held[2] and tonumber(held[3] or 0) <= now
end

-- Ask for a wake-up where one is needed. Returns 1 or 0.
local function ask(state, now)
  if not sleeps(state, now) then return 0 end
  redis.call('HSET', state, 'woken', text(now))
  return 1
end
